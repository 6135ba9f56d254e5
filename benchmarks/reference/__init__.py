"""Generated blocks of the reference pages: tables of public names, and the help of each command."""
