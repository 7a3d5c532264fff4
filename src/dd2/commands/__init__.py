"""What the commands do: each module is one command, from its configuration to the files it leaves."""
