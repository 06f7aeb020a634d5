"""`srdeploy bench`: latency, accuracy and cost of artifacts against a baseline, with verdicts."""
