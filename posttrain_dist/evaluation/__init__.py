"""What a trained model says: generated answers, before and after, and how many are right."""
