"""What surrounds the theory: settings, files, entry points, processes, terminals, figures, the command line.

    settings     models of TOML tables, errors in one sentence, keys described for help and docs (pydantic)
    keys         ``--keys``: what a settings file may hold
    files        files that are whole or not there
    registry     commands, backends, tunables and versions that installed packages offer
    processes    the processes of a run (accelerate)
    console      tables, progress and notes on a terminal; plain text in a pipe (rich)
    figures      palette, panels, contact sheets, files of figures (matplotlib, PIL)
    cli          ``sdeblend COMMAND``

``import sdeblend`` imports none of these.
"""
