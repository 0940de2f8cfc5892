"""Control logic without Ray: leases, legs, membership, admission and policy are pure; sessions are asyncio."""
