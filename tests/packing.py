"""A slow twin of the packing of a window."""


def slow_best_fit(sizes: list[int], row_tokens: int) -> list[list[int]]:
    """Places of the groups of each row: the largest first, into the row with the least room."""
    rows: list[list[int]] = []
    for group in sorted(range(len(sizes)), key=lambda group: -sizes[group]):
        left = [row_tokens - sum(sizes[other] for other in row) for row in rows]
        fitting = [(room, row) for row, room in enumerate(left) if room >= sizes[group]]
        if fitting:
            rows[min(fitting)[1]].append(group)
        else:
            rows.append([group])
    return rows
