"""What `megatron-cpo evaluate` can do: a module here for each subject, with a `main()`."""
