package watch

// Descendants lists the processes below root, in no order.
func Descendants(root int) []int {
	t := newTree(root)
	defer t.release()
	var pids []int
	for pid := range t.walk() {
		pids = append(pids, pid)
	}
	return pids
}
