"""The command `offload`: one file for each subcommand, over the same public face that users have."""
