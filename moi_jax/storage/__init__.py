"""Object stores: gs:// and s3://."""
