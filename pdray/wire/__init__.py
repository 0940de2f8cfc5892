"""Communication between processes: messages by conversation, frames, the handshake, sessions over TCP."""
