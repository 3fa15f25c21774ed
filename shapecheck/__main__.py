"""`python -m shapecheck`: the command line without the installed script."""

from shapecheck.cli import main

main(prog_name="shapecheck")
