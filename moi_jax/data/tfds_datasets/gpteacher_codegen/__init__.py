"""GPTeacher code instructions in many languages; rows {instruction, input, response}."""
