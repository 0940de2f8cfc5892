"""Blocks between two GPUs over NCCL: pack → staging ring → send ‖ receive → staging ring → unpack."""
