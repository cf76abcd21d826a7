"""What the recipes share: arguments, models, data, and the report."""
