"""From records to tables, figures, a report and the leaderboard."""
