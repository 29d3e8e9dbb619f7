"""The style of the report: screen, narrow screen and paper."""

STYLE = """
:root { color-scheme: light; --ink: #1a1a1a; --soft: #5a5a5a; --line: #d8d8d8; --ground: #f6f7f9;
  --pass: #006b4f; --fail: #a83e00; --weak: #7a5600; --link: #005a8f; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink); background: #fff;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
header > p, article > p, article > ul { max-width: 46rem; }
a { color: var(--link); }
section { margin-top: 2rem; }
article { margin-top: 2.5rem; padding-top: 1.5rem; border-top: 2px solid var(--line); }
.banner { padding: .8rem 1rem; border-left: .4rem solid; background: var(--ground); font-size: 1.1rem; }
.banner.pass { border-color: var(--pass); }
.banner.fail { border-color: var(--fail); }
.mark { font-weight: 600; white-space: nowrap; }
.mark.pass, .banner.pass > span { color: var(--pass); }
.mark.fail, .banner.fail > span { color: var(--fail); }
.mark.weak { color: var(--weak); }
.mark.fail, .mark.weak { border: 2px solid; padding: 0 .35em; border-radius: .2em; white-space: normal; }
dl.run { margin: 1rem 0; padding: .6rem 1rem; background: var(--ground); font-size: .92rem; }
dl.run > div { display: flex; flex-wrap: wrap; gap: 0 .8rem; }
dl.run dt { flex: 0 0 6.5rem; color: var(--soft); }
dl.run dd { margin: 0; flex: 1 1 14rem; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; line-height: 1.4; margin: .8rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
td[data-label="value"], td[data-label="bound"], td[data-label="margin"] { white-space: nowrap;
  font-variant-numeric: tabular-nums; }
td sup { line-height: 0; }
.formula { overflow-x: auto; padding: .8rem 1rem; background: var(--ground); margin: 1rem 0; }
.formula img { display: block; height: auto; max-width: max(100%, 30rem); margin: .35rem 0; }
figure { margin: 1.2rem 0; overflow-x: auto; }
figure img { display: block; width: 100%; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
@media (max-width: 46rem) {
  h1 { font-size: 1.45rem; }
  thead { position: absolute; left: -9999px; }
  table, tbody, tr, td { display: block; }
  tr { border: 1px solid var(--line); border-radius: .3rem; padding: .4rem .6rem; margin: .6rem 0; }
  td { border: 0; padding: .1rem 0; display: grid; grid-template-columns: 5.5rem 1fr; gap: .5rem; }
  td::before { content: attr(data-label); color: var(--soft); overflow-wrap: anywhere; }
  td:first-child { display: block; font-weight: 600; }
  td:first-child::before { content: none; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 9pt; }
  h2, h3, thead { break-after: avoid; }
  tr, figure, .formula, .banner, dl.run { break-inside: avoid; }
  h2 { font-size: 13pt; }
  article { margin-top: 1.5rem; padding-top: 1rem; }
  figure { margin: .6rem 0; }
  figure img { min-width: 0 !important; max-width: 88%; }
  .formula { padding: .4rem .6rem; margin: .6rem 0; }
  .formula img { max-width: 100%; }
  figure, .formula { overflow: visible; }
  a { color: inherit; text-decoration: none; }
}
"""
