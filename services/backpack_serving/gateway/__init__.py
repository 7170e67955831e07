"""The gateway: who calls, which release their request gets, which replica runs it. No torch, no ray, no state."""
