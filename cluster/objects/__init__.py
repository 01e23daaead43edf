"""The object store: pictures, manifests and control images, in a directory or an S3 bucket."""
