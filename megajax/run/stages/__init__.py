"""What the stages of a run do, a file for each; `megajax.run.pipeline` says in which order.

Each stage is a function of the task (the configuration, its data and network), of the outcomes of
the stages before it, and of the checkpoints that it may go on from and save to. It returns its
outcome, networks and figures; how outcomes are stored is up to the pipeline.
"""
