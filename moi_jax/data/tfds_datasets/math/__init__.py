"""MATH (Hendrycks et al.): competition problems; rows {problem, level, type, solution}."""
