"""How gateways and replicas stay in step with the intervention service: one state machine for each end."""
