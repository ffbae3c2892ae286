"""The leaderboard: a protocol that every entry is measured by, entries, and how they rank."""
