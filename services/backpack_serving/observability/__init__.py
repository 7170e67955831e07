"""What is seen from outside: metrics, their HTTP listener, logs, traces."""
