"""The method, with torch and numpy alone: scores, ranking, selection, completion; `reference` is the specification."""
