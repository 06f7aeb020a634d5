"""The command line: verbs parse their options, import what they need, and hand over to the
library."""
