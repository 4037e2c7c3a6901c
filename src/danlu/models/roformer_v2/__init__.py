"""RoFormerV2 encoders for the host library."""
