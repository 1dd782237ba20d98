"""Stand-ins for what the adapter in ``integrations/upstream_exo`` imports from upstream exo, by the same names.

A test makes a package of these and of exo's own folders, as in upstream's tree with the adapter in it.
"""
