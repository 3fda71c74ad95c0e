"""Data: reads conversations from files; renders, tokenises, caches, mixes, packs, loads them."""
