"""Rules: how each layer family runs under capture, and which factors its backward hands over."""
