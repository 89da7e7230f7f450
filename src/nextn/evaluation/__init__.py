"""Measuring a trained model: free-running acceptance, conventions, tasks, prompts and completions."""
