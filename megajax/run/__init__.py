"""The command line: `python -m megajax.run --config FILE`, its workdir and its stages."""
