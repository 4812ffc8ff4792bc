"""Other programs, run on the same work in processes of their own, to be measured against."""
