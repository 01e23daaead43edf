"""The object store: pictures, videos, manifests and control images, in a directory or an S3 bucket."""
