"""A run on a virtual clock: the very scheduler and feed of a run, over modelled engines, trainer and environments.

workload.py  how long rollouts are, how long environments take, how often a rollout fails
cluster.py   how fast engines decode, the trainer trains and weights are published
engine.py    one engine: continuous batching as processor sharing
loop.py      the controller's loop in discrete events; what it leaves out is listed there
tally.py     what is counted on the way, and the figures of a whole run
fit.py       workload and cluster from the record of a past run
compare.py   one simulation per setting, and what each change buys
"""
