"""Load over the wire: what a user waits for, measured at the user's side of REST and gRPC.

`python -m loadtests smoke|selftest|compare|gate`, or `locust -f loadtests/locustfile.py` for locust's own page.
"""
