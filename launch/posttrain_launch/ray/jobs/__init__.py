"""A run as a job of Ray's job API.

sending.py  what `posttrain submit cluster=ray` does here
arrival.py  what the job does on a cluster that the sender shares no folder with
"""
