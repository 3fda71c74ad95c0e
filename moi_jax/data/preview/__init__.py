"""Preview: shows what is trained on, and checks it."""
