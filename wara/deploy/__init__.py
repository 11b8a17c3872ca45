"""From a run to the hospital: bundles, what they predict, and what is known of them."""
