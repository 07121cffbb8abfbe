"""What jobs learn from: lines of a file (`lines`), conversations (`chat`), tokenised examples (`rows`)."""
