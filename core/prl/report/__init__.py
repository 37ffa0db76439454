"""One HTML page about a run, from the files of its directory.

load.py     metrics.jsonl, run.toml, plugins.lock, state.json -> Record (a run may still be going, or have died)
samples.py  the two ends of rollouts.jsonl, however long it is
charts.py   which curves are shown, of which metrics, and what they mean
plots.py    a chart as inline SVG
page.py     the page
"""
