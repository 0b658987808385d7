"""Ours against the peer, same work, same run; run them as python bench/NAME.py."""
