"""What a diffusers pipeline is made of: its networks, its schedule, what it takes and gives, who it is."""
