"""Print what Ray says of the job of a run folder: state, stop, tail or follow, and the folder.

A process of its own, because Ray looks once, when it is imported, at whether there is a token.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from posttrain_launch.ray import remote
from posttrain_launch.run.job_record import read_job

question, folder = sys.argv[1:]
record = read_job(Path(folder))
if question == "state":
    print(json.dumps(asdict(remote.state(record))))
elif question == "stop":
    print(json.dumps(remote.stop(record)))
else:
    print(json.dumps("".join(remote.tail(record, follow=question == "follow"))))
