"""Small games for a policy of 0.3M parameters on a CPU: tokenizer, scripted agents, warm start."""
