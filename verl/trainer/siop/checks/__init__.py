"""What is looked at before a run starts: settings, machine, data, policy and prompts, services."""
