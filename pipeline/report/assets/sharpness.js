/* uPlot draws as finely as the screen shows; a printed page shows more. It reads this when it is loaded. */
window.devicePixelRatio = Math.max(2, window.devicePixelRatio);
