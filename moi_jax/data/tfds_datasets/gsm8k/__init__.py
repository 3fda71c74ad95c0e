"""GSM8K: grade-school maths problems with worked answers; rows {question, answer}."""
