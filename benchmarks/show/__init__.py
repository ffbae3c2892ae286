"""From records to what people read: tables, figures, a report, the leaderboard."""
