"""Subcommands of ``dcqfa``, one module each with ``register(subparsers)``; ``dcqfa_ros.cli`` imports them on demand."""
