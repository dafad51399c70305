"""Where the trials of a sweep run: each file holds one `Backend` of `sweep/base.py`.

basic.py        one after another, each a process on this machine
slurm_array.py  one job array
on_ray.py       packed on the free resources of a Ray cluster; ray_resources.py is what tells them
"""
