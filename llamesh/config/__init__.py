"""What a user may write: config.yaml with its environment, and the cookbook of models.

`settings` and `cookbook` are the two entrances, `check` joins them for the command line.
Every error of every file is found in one go and raised as one `ConfigError`.
"""
