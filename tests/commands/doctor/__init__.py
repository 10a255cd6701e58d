"""`llamesh doctor`, section by section."""
