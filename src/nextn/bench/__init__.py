"""`nextn bench`: ways to decode, timed in turn, and a verdict.

request     what is asked, checked; plan: its models, arms and prompts; run: measuring, and the report
arms        ways to decode; timing: all arms in one scenario
peers       other engines with the same weights; peer_engines: starting them
approaches  four ways to decode, each with a model of its own
figures     what was measured; verdict: what to do; page: the HTML page
"""
